"""What people see: summary, pictures, model cards, and where a model comes from."""
