select d.consumer from pgonce.consumers c cross join lateral pgonce.drop_consumer(c.consumer) d where c.consumer = $1
