"""What is known of the libraries that pretrained models come from, one file each."""
