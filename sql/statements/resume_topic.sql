select topic from pgonce.resume_topic($1)
