"""Parts of the packaged base student's training: pictures, lessons, and its folder on disk."""
