"""What `numbers.py` computes, room by room, and how it is hashed."""
