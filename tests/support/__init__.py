"""What tests share: models, data, and a look inside."""
