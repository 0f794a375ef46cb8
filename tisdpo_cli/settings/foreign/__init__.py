"""Options of other trainers: taken, translated, without effect, or refused with what to use instead."""
