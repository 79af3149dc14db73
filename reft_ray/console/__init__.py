"""The console: pages for the people in the loop, served by the same application as the API."""
