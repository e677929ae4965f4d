select pgonce.restore_sequence()
