"""What the packaged base student is trained on: pictures, lessons, and its folder on disk."""
