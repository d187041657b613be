"""What attacks share: queues, losses, targets, queries and refinement."""
