delete from pgonce.plain_queue where id = $1
