-- What there is of an order ($2) for an item ($1), which is also the name of its topic and of its consumer. Copies are counted
-- by what a message says, and not by its id: that no id is there twice would say nothing.
select (select count(*) from pgonce.queue q join pgonce.topics t using (topic_id)
        where t.topic = $1 and q.payload ->> 'order' = $2) as copies,
       (select l.lag + l.parked from pgonce.consumer_lag l where l.consumer = $1) as due,
       (select count(*) from pgonce.dead_letters d join pgonce.consumers c using (consumer_id) where c.consumer = $1) as dead,
       (select i.stock from pgonce.inventory i where i.item = $1) as stock
