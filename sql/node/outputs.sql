select o.event_id, o.word, o.count from pgonce_node.outputs o where o.is_visible order by o."position"
