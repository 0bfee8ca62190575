"""A trained model in other forms: an adapter merged into its base, which is proven, and other layouts. Floor 6."""
