"""Sets of pictures: made, read, and compared by features."""
