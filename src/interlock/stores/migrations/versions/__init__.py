"""One module a revision; `migrations.STEPS` has their order."""
