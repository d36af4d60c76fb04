"""What rows cost at each width, and a budget of bits, in; the width of every row out."""
