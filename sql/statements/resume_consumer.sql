select consumer from pgonce.resume_consumer($1)
