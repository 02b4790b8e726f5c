"""Small labelled pictures and a small pretrained CLIP: examples run on them offline."""
