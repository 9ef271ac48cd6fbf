//! Any bytes as a header and as the payload of every message: what is understood is said again in the same words.

use vhost_user::Error;
use vhost_user::protocol::{
    BackendMessage, BackendRequest, FrontendMessage, FrontendRequest, HEADER_SIZE, Header, Info, Layout,
};

pub fn run(input: &[u8]) {
    let Some((&[request, descriptors], input)) = input.split_first_chunk::<2>() else { return };
    if let Some((head, _)) = input.split_first_chunk::<HEADER_SIZE>() {
        let header = Header::decode(head);
        let mut again = Vec::new();
        header.encode(&mut again);
        assert_eq!(&again[..], head);
        let _ = (header.check_size(), header.check_request(), header.check_reply(1, "GET_FEATURES"));
    }
    front_end(usize::from(request), input, usize::from(descriptors));
    back_end(usize::from(request), input, usize::from(descriptors));
}

macro_rules! both_ways {
    ($name:ident, $request:ident, $message:ident) => {
        fn $name(row: usize, payload: &[u8], descriptors: usize) {
            let info = &$request::TABLE[row % $request::TABLE.len()];
            let request = $request::from_id(info.id).unwrap();
            assert_eq!(request.info(), info);
            match $message::decode(request, payload, descriptors) {
                Ok(message) => {
                    assert_eq!(message.request(), request);
                    let mut again = Vec::new();
                    message.encode(&mut again);
                    assert!(again.len() <= payload.len());
                    assert_eq!($message::decode(request, &again, descriptors).unwrap(), message);
                    check_layout(info, payload, true);
                }
                Err(Error::Refused { message, reason }) => {
                    assert_eq!(message, info.name);
                    assert!(!reason.is_empty());
                    check_layout(info, payload, reason.contains("descriptors"));
                }
                Err(other) => panic!("{}: {other}", info.name),
            }
        }
    };
}

both_ways!(front_end, FrontendRequest, FrontendMessage);
both_ways!(back_end, BackendRequest, BackendMessage);

/// Who only looks at a message agrees with who takes it, and never sees more than there is.
fn check_layout(info: &Info, payload: &[u8], is_good: bool) {
    let layout = Layout::named(info.payload).unwrap();
    assert_eq!((layout.check)(payload).is_ok(), is_good, "{}", info.name);
    let (_, rest) = layout.read(payload);
    assert!(payload.ends_with(rest));
}
