"""A trained model in other forms: an adapter merged into its base, and the proof that the merge is right. Floor 6."""
