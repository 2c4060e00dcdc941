"""What runs in a merged model, and travels with its checkpoint: needs torch and transformers alone."""
