"""The paper's figures, one file each: train the models a figure needs, test them, draw it."""
