"""What the project claims about speed: `python -m bench`, always a ratio to a peer in one run."""
