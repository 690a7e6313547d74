"""Using trained models: opening run folders, generating text, measuring losses and exporting."""
