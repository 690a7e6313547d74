"""The paper's figures, one file each: train what a figure needs, test it, draw it."""
