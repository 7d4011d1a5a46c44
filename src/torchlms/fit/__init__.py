"""What a budget gives, before training: from recordings of small batches, or from tape files alone."""
