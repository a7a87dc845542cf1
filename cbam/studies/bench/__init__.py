"""What attention costs: correctness first, then times in turns against peers on the same machine."""
