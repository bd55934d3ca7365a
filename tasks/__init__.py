"""Lightning modules and data for the four tasks."""
