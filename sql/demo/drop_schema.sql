drop schema pgonce cascade
