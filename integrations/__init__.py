"""Where an adapter attaches: one module a library, the objectives and the trainer."""
