"""The algorithm as functions of tensors and plain data: filter, vote, reward, advantage and loss."""
