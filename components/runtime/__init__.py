"""Ground floor: errors, device, process groups, seeds, logging, garbage collection."""
