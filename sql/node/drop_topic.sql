select d.topic from pgonce.topics t cross join lateral pgonce.drop_topic(t.topic) d where t.topic = $1
