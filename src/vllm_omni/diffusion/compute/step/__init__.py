"""Parts of a denoising step that all packed families share."""
