select count(*) as documents from pgonce.documents
