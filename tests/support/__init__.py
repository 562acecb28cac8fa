"""What tests of several folders share: random targets and small datasets."""
