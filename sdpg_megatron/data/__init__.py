"""From data files to prompts: reading, rendering for student and teacher, and the order in which steps take them."""
