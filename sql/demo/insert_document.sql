insert into pgonce.documents (document_id, words) values ($1, $2)
