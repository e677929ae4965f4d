-- How many offsets a consumer of one partition has passed.
select o.next_offset - 1 as passed from pgonce.consumer_offsets o where o.consumer = $1
