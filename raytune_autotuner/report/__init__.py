"""What is seen: the results folder, the terminal, the logs, TensorBoard. Knows no engine, no Ray, no Optuna."""
