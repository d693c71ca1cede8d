"""Recipe: what a user may say, checked; YAML text in, frozen values out."""
