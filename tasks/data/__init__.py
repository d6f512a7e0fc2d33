"""What is known of the data: where it comes from, what is wrong with a pair, and how it becomes token ids."""
