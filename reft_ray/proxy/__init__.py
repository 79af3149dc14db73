"""A reverse proxy in front of any service with OpenAI's finetuning API: it screens training files and chat."""
