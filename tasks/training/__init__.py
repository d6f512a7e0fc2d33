"""How a model learns: what stays frozen, the loss, the loop, and what outlives a lost machine."""
