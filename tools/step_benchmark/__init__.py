"""One training step, taken in several forms by one student under one engine: models, forms, figures."""
