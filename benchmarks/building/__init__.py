"""Host memory that building student and teacher takes at ZeRO-3: weights made one at a time, or whole on every rank."""
