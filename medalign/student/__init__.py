"""The student: families of models, loading, steering, attention capture, query mixture."""
