"""Tables, plots and statistics of finished runs."""
