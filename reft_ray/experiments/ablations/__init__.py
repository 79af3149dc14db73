"""What each setting of the method does, and the conflict of gradients that it argues from."""
