"""What a run will take before anything is built: parameters, memory, layouts; torch-free."""
