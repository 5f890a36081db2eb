"""What runs inside sglang's scheduler processes: the plugin with its hooks."""
