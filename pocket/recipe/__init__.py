"""How the pocket models were made."""
